// Giving up Python's lock, also when the process ends meanwhile.
#pragma once

#include <Python.h>
#include <unistd.h>

namespace kvpool {

// Gives the GIL up for as long as it lives.
//
// A daemon thread that wants it back when the interpreter is at its end gets pthread_exit (up to Python 3.13), which
// unwinds the stack, and would end the process where it comes to a function of nanobind's that must not throw. So it
// stays here, as later Pythons let it; nobody waits for such a thread.
class ReleasedGil {
 public:
  ReleasedGil() : state_(PyEval_SaveThread()) {}
  ~ReleasedGil() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {
      while (true) pause();
    }
  }
  ReleasedGil(const ReleasedGil&) = delete;
  ReleasedGil& operator=(const ReleasedGil&) = delete;

 private:
  PyThreadState* state_;
};

}  // namespace kvpool
