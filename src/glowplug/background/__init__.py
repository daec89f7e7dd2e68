"""Work that other processes do for this one."""
