"""A job in a process of its own, and the group of processes that share one."""
