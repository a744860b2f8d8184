"""LoRA: the layer and its fused functions, mixtures, proximal AdamW, updates and their merge."""
