"""Files, or a generator, to batches. Nothing here knows about embeddings or models.

Shapes: B batch, F features (categorical columns), N ids of the batch, rows of the file.

What every dataset has; the constructor has read no rows, what is marked * needs prepare() first:
  feature_names         names of the F categorical columns, in the order of Batch.ids
  dense_names           names of the dense columns, in the order of Batch.dense
  fingerprint           hex text that changes with whatever changes the samples; the same on resuming
  prepare(keep_unseen)  makes the samples readable, as often as called; in the features of this set, ids that training
                        never had stay distinct (>= the cardinality), in the others they become 0
  cardinalities *       feature -> number of ids that training has, 0 of the unknown included, in the order of Batch.ids
  num_samples *         {train, valid, test} -> samples; only valid may be 0
  batches(split, batch_size, *, epoch=0, start=0) *
                        iterates over Batch, from sample `start` on; the last may be smaller. Train is shuffled, a pure
                        function of the shuffle seed and the epoch; valid and test have one order
  picks(split, batch_size, *, epoch=0, start=0) *, take(split, index, device="cpu") *
                        the same in two steps: the samples of each batch, int64 or int32 numbers in the split, and their
                        Batch on a device
  best_possible_auc(split) *
                        AUC of the true click probabilities where they are known, NaN for an empty split, else None
  describe() *          one line for the terminal"""
