#pragma once

#include <cstdint>

#include "host_memory.h"
#include "xla/ffi/api/c_api.h"

extern "C" {
XLA_FFI_Error* KvPoolLoadCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* KvPoolStoreCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* KvPoolLoadByEngineCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* KvPoolStoreByEngineCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* KvPoolScratchCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* KvPoolStartCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* KvPoolWaitCuda(XLA_FFI_CallFrame* call_frame);
}

namespace kvpool {

// The table that the CPU module keeps; to be set before the first call.
void SetLiveMemory(const LiveMemory* live);

// Waits, on the host, for copies that a failed step has left behind and that touch some of these bytes, of the host or
// the device, and forgets them.
void AbandonFlights(const void* data, int64_t bytes);

// How many starts are not yet waited for to the end.
int64_t NumFlights();

// How often a handler has enqueued (or captured) a copy in this process: replays of a CUDA graph do not count.
int64_t NumHandlerCalls();
// In how many of those with ids that the CPU can read, without a model beside them, the copy engine had a part.
int64_t NumEngineCalls();

}  // namespace kvpool
