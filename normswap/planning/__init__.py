"""Plan: a request and a NormMap give a Plan."""
