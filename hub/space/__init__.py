"""A Gradio Space over the zoo, on this machine by `nfzoo space`, and on the Hub by `nfzoo space deploy`."""
