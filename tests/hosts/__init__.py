"""Real hosts for the tests: tiny checkpoints and a WebUI process to serve them."""
