"""Other programs on what Trimtab wrote: `make test-interop`."""
