"""Jobs: work that other processes do for this one."""
