"""A double of the WebUI's `modules` package: its interfaces, without its code."""
