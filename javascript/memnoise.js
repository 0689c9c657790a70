// Shows the controls that the chosen method, preset, "when" and start of guidance use; no round trip to the server.
function memnoiseShow(tab, methodLabel, presetLabel, whenLabel, guidanceLabel, ruleLabel) {
    const root = gradioApp().querySelector(`#script_${tab}_memnoise_enabled`);
    if (!root) return [];
    const names = JSON.parse(root.querySelector(".memnoise-labels").dataset.labels);
    const method = names.method[methodLabel];
    const preset = names.preset[presetLabel];
    const guidance = names.guidance[guidanceLabel];
    const now = {
        when: names.when[whenLabel],
        guidance: guidance === "method" ? names.starts[method] : guidance,
        rule: names.rule[ruleLabel],
    };
    for (const part of root.querySelectorAll(".memnoise-part, .memnoise-custom, .memnoise-only")) {
        const has = (name) => part.classList.contains(`memnoise-${name}`);
        const shown = (!has("part") || has(method)) &&
            (!has("custom") || preset === "custom") &&
            (!has("only") || Object.entries(now).some(([name, value]) => has(`only-${name}-${value}`))) &&
            (!has(`with-${method}`) ||
                Object.entries(now).some(([name, value]) => has(`with-${method}-${name}-${value}`))) &&
            (!has("preset-hint") || has(`preset-${preset}`));
        part.classList.toggle("memnoise-hidden", !shown);
    }
    return [];
}

// Shows where captions go while they are what the checkpoint is calibrated with.
function memnoiseSource(own, label) {
    const captions = gradioApp().querySelector("#script_txt2img_memnoise_captions");
    captions?.classList.toggle("memnoise-shown", label === own);
    return [];
}

// Runs a button's request as Generate's is: with the host's progress bar and its Interrupt.
function memnoiseTask(...values) {
    const id = randomId();
    showSubmitButtons("txt2img", false);
    requestProgress(id, gradioApp().querySelector("#script_txt2img_memnoise_verdict"), null, () => {
        showSubmitButtons("txt2img", true);
    });
    return [id, ...values.slice(1)];
}

onUiLoaded(() => {
    // The first values may come from ui-config.json, so they are read off the page.
    for (const tab of ["txt2img", "img2img"]) {
        const value = (name) => gradioApp().querySelector(`#script_${tab}_memnoise_${name} input`)?.value;
        memnoiseShow(tab, ...["method", "preset", "when", "guidance", "rule"].map(value));
    }
});
