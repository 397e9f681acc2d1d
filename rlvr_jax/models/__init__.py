"""Dense Qwen2, Qwen2.5 and Qwen3 models: config, Flax module, key / value cache, Hugging Face folders in and out."""
