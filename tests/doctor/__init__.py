"""The doctor: what it reports, and that each of its checks finds what it is for."""
