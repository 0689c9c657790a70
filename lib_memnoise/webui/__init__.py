"""Everything that imports a WebUI's `modules.*`, and nothing else does."""
