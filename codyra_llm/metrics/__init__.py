"""Text in, score out. Nothing here imports torch or evaluate, but for hf.py."""
