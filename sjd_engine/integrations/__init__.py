"""What other serving stacks load of this package. Nothing here imports them before they ask for it."""
