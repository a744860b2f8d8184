"""Base models: loading, weights, tokenizer, attention, quantisation, loss."""
