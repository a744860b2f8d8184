"""Methods that project gradients or updates away from old tasks."""
