"""Measures the way between the sites before a run needs it: one TCP connection, no torch.

    edge                                            cloud, listens at link.address
    meeting.connect ──────────────────────────────► meeting.listen
                    ◄── hello, hello ──►            who are you, what will you run
    figures.measure ──── ping, ping, … ────────────► figures.answer      latency, clock
                    ════ zeros, for some seconds ══► counts              bandwidth up
    counts          ◄═══ the same back ═════════════                     bandwidth down

`wire` is what goes over it: JSON behind its length. Whoever connects is a stranger until his hello is read.
"""
