"""The record of a run: who did what to which bytes, signed by the party that did it.

The idea: each party keeps a log of signed *events*. An event lists the files that it produced by their SHA-256, names its
signer's previous event, and names the events of the other party that it builds on. Nobody can therefore change, insert
or drop an event unnoticed, except the last ones of a log. The events of both parties are merged without trusting either:
whoever merges the same events gets the same bytes, and the *canonical record* of the run and its *number* follow from
them.

    canonical     canonical JSON, and the number of a record
    artifacts     the files of a copy, an update or a model, by digest
    commitments   salted commitments to texts that are not shown
    events        one signed event: a DSSE envelope around an in-toto statement
    bundle        a set of events, the canonical record that follows from them, and the file that holds both
    log           a party's own log
    verification  compares a record with the files that are at hand
    pith          the records of the Pith open graph, whose numbers ours are formed like

A record proves that a holder of a key signed that certain bytes were published, returned or computed, in which order. It
does not prove that they were computed as the method says, that the committed texts are the ones that were trained on, or
that a model has forgotten.
"""
