"""Networks split into a trunk that experts share and the late stages that each expert owns."""
