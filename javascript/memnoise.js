// Shows the controls of the chosen method and, for the preset "custom", its values; no round trip to the server.
function memnoiseShow(methodLabel, presetLabel) {
    const root = gradioApp().querySelector("#script_memnoise_enabled");
    if (!root) return [];
    const names = JSON.parse(root.querySelector(".memnoise-labels").dataset.labels);
    const method = names[methodLabel];
    const preset = names[presetLabel];
    for (const part of root.querySelectorAll(".memnoise-part")) {
        const shown = part.classList.contains(`memnoise-${method}`) &&
            (!part.classList.contains("memnoise-preset-hint") || part.classList.contains(`memnoise-preset-${preset}`));
        part.classList.toggle("memnoise-hidden", !shown);
    }
    for (const control of root.querySelectorAll(".memnoise-custom")) {
        control.classList.toggle("memnoise-hidden", preset !== "custom");
    }
    return [];
}

onUiLoaded(() => {
    // The first values may come from ui-config.json, so they are read off the page.
    const value = (name) => gradioApp().querySelector(`#script_memnoise_${name} input`)?.value;
    memnoiseShow(value("method"), value("preset"));
});
