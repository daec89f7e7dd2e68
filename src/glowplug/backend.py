"""`torch.compile(model, backend="glowplug")`: the pieces of each graph that Dynamo hands over, each compiled once."""
