"""Computing again what was recorded: to compare it, to continue it, to measure it later."""
