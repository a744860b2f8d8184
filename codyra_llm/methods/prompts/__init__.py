"""Methods that train prompts and leave the weights as they are."""
