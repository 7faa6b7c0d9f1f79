"""Several hospitals and a coordinator: who takes part, with which keys, and what each site allows."""
