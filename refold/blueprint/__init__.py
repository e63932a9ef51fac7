"""The one description everything else reads: a stack of depths over pools of stored parts. Free of torch."""
