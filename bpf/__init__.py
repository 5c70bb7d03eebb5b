"""The programs that count pods' traffic, and the bpf(2) side of loading, attaching and reading them."""
