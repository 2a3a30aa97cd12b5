"""The private torch names that tpplan uses, in one place, tested on every supported torch."""
