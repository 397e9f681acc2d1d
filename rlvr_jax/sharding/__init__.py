"""How arrays lie on a mesh: the rules, what runs inside shard_map, and the layout of decoding."""
