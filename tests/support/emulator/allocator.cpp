// torch's CPU allocator, which tells the emulator of every allocation: kernels then may touch nothing else.
#include <c10/core/Allocator.h>
#include <string.h>

extern "C" void emu_region(void* base, size_t bytes, const char* name, int output);
extern "C" void emu_forget(void* base);

namespace {

c10::Allocator* inner;  // whose memory is freed by its address alone

void release(void* base) {
  emu_forget(base);
  inner->raw_deallocate(base);
}

struct Tracking final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    c10::DataPtr data = inner->allocate(bytes);
    void* base = data.get();
    if (!base) return data;
    emu_region(base, bytes, "a tensor", 0);
    const c10::Device device = data.device();
    return {base, data.release_context(), release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
};

}  // namespace

// from now on; tensors made before are unknown to the emulator
extern "C" void emu_track_tensors() {
  static Tracking tracking;
  inner = c10::GetAllocator(c10::DeviceType::CPU);
  c10::SetAllocator(c10::DeviceType::CPU, &tracking, 255);
}
