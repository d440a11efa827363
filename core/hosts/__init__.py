"""The hosts: one file each, and the only files of core that import their host."""
