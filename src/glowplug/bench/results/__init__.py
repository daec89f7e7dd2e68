"""Records of measurements, the machine they were made on, and tables and plots of them."""
