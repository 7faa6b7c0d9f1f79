"""What happened and what was learned, on disk: safetensors, JSON and TOML only."""
