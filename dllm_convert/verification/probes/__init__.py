"""The probes: each measures one thing that a converted checkpoint claims."""
