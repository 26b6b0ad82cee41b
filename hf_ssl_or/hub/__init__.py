"""What leaves the machine: the model card of a run, the push to the Hub, and the layouts of other libraries."""
