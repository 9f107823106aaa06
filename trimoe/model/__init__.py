"""A model on paper: its decoder layers, MoE blocks and routers. The only room that knows transformers from inside."""
