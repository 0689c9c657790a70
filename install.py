"""Nothing to install: memnoise uses only what the WebUI brings."""
