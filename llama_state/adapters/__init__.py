"""What knows other bindings; a module here is imported only where its binding is in use."""
