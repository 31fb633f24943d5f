"""The processes of a run: how they find each other, wait for each other, and leave together.

limits.py     how long they wait for each other
start.py      find the peers that a launcher started, and connect to them
detect.py     what each launcher says about the peers
addresses.py  hosts and ports, and whether a host is this machine
variables.py  all variables of ours, so that a mistyped one is noticed
tls.py        certificates for the coordinator
roll_call.py  all peers are there, once each, and agree, before JAX connects them
introduce.py  what each says of itself there, and whether it fits together
store.py      small texts that all processes see
wait.py       every wait for other processes, named and bounded
first.py      what the first process does for all
leave.py      exit codes; a failure that ends all processes
told.py       what SIGTERM and Ctrl-C do
terminal.py   leaves a terminal as it was
news.py       what the other processes announced
watchdog.py   ends a run that is alive and stuck, and says where
memory.py     the share of each GPU's memory that a command takes
process.py    which process this is, and its log
"""
