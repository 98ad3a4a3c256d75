"""nfzoo's models under the interfaces of other libraries: importing a module here registers them there."""
