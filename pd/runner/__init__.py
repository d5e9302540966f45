"""One process per accelerator: executes step orders; owns weights, KV memory and the transfer engine."""
