"""The events, the plugins that implement them, and the order in which plugins are called."""
