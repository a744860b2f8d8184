"""Methods that keep a module per task and choose among them."""
