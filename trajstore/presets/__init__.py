"""Presets: experiments as TOML files, one a file. `trajstore presets NAME` prints one to start your own from."""
