"""The run folder: what is written, how it is kept whole, who may write."""
