"""A double of the WebUI's interfaces; `host.Double` is the way in."""
