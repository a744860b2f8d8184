"""Methods that train one adapter after the other and merge it."""
