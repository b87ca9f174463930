"""How a slab is written: segments, late metrics, resume states, declarations."""
