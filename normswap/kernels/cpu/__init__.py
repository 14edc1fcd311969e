"""Norms on the CPU: by a C kernel where there is a compiler (`norm`), in few passes of torch where not (`few_passes`)."""
