"""The page: accordion, buttons, settings page, X/Y/Z axes."""
