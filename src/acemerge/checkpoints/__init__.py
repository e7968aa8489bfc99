"""All that knows a file format: reading folders of safetensors and writing them."""
