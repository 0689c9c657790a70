"""How each kind of host asks its network."""
