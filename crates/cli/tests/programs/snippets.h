/* The pieces of machine code: name, the flags that are defined after it, text. RDI points at the end of a page,
 * RSI into another place, RCX is 5; see snippets.c. */
#define ARITHMETIC 0x8d5
#define LOGIC 0x8c5  /* all but AF */
#define SHIFT 0x0c5  /* all but AF and OF */
#define CARRY 0x001
#define NONE 0
#define ZERO 0x040
/* Which of its bytes the fault of a wide or masked operand names is the CPU's own affair: only the page counts. */
#define WIDE (1ull << 33)
/* So is how often a gather stops on its way when it is stepped. */
#define STOPS (1ull << 34)
/* And what a frame or an area holds that a fault leaves half-done: stored slots, the CPU's own fields. */
#define FRAME (1ull << 35)
/* Intel's and AMD's CPUs differ in the flags of a repetition that is interrupted: RF of a trap between two iterations is
 * set on Intel's, and after a fault theirs are those from before the first iteration. */
#define REPEATED (1ull << 36)
#define SNIPPETS(X) \
    X(load8, NONE, "mov (%rdi),%al") \
    X(load16, NONE, "mov (%rdi),%ax") \
    X(load32, NONE, "mov (%rdi),%eax") \
    X(load64, NONE, "mov (%rdi),%rax") \
    X(load_back, NONE, "mov -16(%rdi,%rcx,4),%rdx") \
    X(sign_extend, NONE, "movslq (%rdi),%r8\nmovsbw (%rdi),%r9w") \
    X(store8, NONE, "mov %al,(%rdi)") \
    X(store16, NONE, "mov %ax,(%rdi)") \
    X(store32, NONE, "mov %eax,(%rdi)") \
    X(store64, NONE, "mov %rax,(%rdi)") \
    X(store_immediate, NONE, "movq $-5,(%rdi)") \
    X(stores, NONE, "mov %rax,-8(%rdi)\nmov %rbx,-16(%rdi)\nmov %rcx,(%rdi)\nmov %rdx,8(%rdi)") \
    X(flags_then_fault, ARITHMETIC, "add %rdx,%rax\nmov (%rdi),%rbx\nadc $0,%rcx") \
    X(flags_in_loop, ARITHMETIC, "1: sub $1,%rcx\nmov %rcx,(%rdi,%rcx,8)\njnz 1b") \
    X(add_to_memory, ARITHMETIC, "add %rax,(%rdi)") \
    X(add_from_memory, ARITHMETIC, "add (%rdi),%rax") \
    X(adc_memory, ARITHMETIC, "stc\nadc %eax,(%rdi)") \
    X(sbb_memory, ARITHMETIC, "stc\nsbb (%rdi),%rdx") \
    X(and_memory, LOGIC, "and %ax,(%rdi)") \
    X(xor_byte, LOGIC, "xor %bl,(%rdi)") \
    X(compare_memory, ARITHMETIC, "cmp %rax,(%rdi)") \
    X(test_memory, LOGIC, "testl $0x8001,(%rdi)") \
    X(inc_memory, ARITHMETIC, "stc\nincq (%rdi)") \
    X(neg_memory, ARITHMETIC, "negl (%rdi)") \
    X(not_memory, ARITHMETIC, "stc\nnotq (%rdi)") \
    X(shift_memory, SHIFT, "shlq %cl,(%rdi)\nsarl $3,(%rdi)") \
    X(rotate_memory, CARRY, "rolq $9,(%rdi)\nrcrl %cl,(%rdi)") \
    X(double_shift, SHIFT, "shld %cl,%rax,(%rdi)\nshrd $7,%edx,(%rdi)") \
    X(bit_test_and_set, CARRY, "bts %ecx,(%rdi)\nbtcq $60,(%rdi)") \
    X(bit_far, CARRY, "mov $-70,%rax\nbtr %rax,(%rdi)") \
    X(exchange, NONE, "xchg %rax,(%rdi)") \
    X(exchange_add, ARITHMETIC, "lock xadd %eax,(%rdi)") \
    X(compare_exchange, ARITHMETIC, "mov (%rdi),%rax\nlock cmpxchg %rbx,(%rdi)") \
    X(compare_exchange_no, ARITHMETIC, "lock cmpxchg %ebx,(%rdi)") \
    X(compare_exchange8, ZERO, "lock cmpxchg8b (%rdi)") \
    X(compare_exchange16, ZERO, "lock cmpxchg16b (%rdi)") \
    X(locked_add, ARITHMETIC, "lock addq $77,(%rdi)\nlock decb (%rdi)\nlock btsl $3,(%rdi)") \
    X(multiply, CARRY, "mulq (%rdi)\nimul $9,(%rdi),%r8") \
    X(divide, NONE, "xor %edx,%edx\nmov (%rdi),%ecx\nor $1,%ecx\ndivl (%rdi)") \
    X(divide_overflow, NONE, "mov $-1,%rdx\ndiv %rcx") \
    X(divide_by_zero, NONE, "xor %ecx,%ecx\nidiv %ecx") \
    X(push, NONE, "push %rax\npush %rbx\npush $5\npush %rcx\npushw %ax") \
    X(push_memory, NONE, "pushq (%rdi)\npushq 8(%rdi)") \
    X(pop_memory, NONE, "popq (%rdi)\npopq 8(%rdi)") \
    X(pop_stack_relative, NONE, "popq 8(%rsp)\npop %rsp") \
    X(push_stack, NONE, "push %rsp\npop %rax\npushq (%rsp)") \
    X(pushf, NONE, "std\npushf\ncld\npopf\ncld") \
    X(call_return, NONE, "call 1f\njmp 2f\n1: mov %rdi,%rax\nret\n2: nop") \
    X(call_memory, NONE, "lea 1f(%rip),%rax\nmov %rax,-8(%rsi)\ncall *-8(%rsi)\njmp 2f\n1: ret $16\n2: nop") \
    X(jump_nowhere, NONE, "mov $0x40000000,%rax\njmp *%rax") \
    X(jump_not_canonical, NONE, "mov $0x8000000000000000,%rax\njmp *%rax") \
    X(return_not_canonical, NONE, "mov $0x8000000000000000,%rax\npush %rax\nret") \
    X(load_not_canonical, NONE, "mov $0x8000000000000000,%rbx\nmov (%rbx),%rax") \
    X(enter_leave, NONE, "enter $32,$0\nmov %rax,-8(%rbp)\nleave") \
    X(rep_movsb, REPEATED, "rep movsb") \
    X(rep_movsq, REPEATED, "rep movsq") \
    X(rep_movsq_to_end, REPEATED, "xchg %rdi,%rsi\nrep movsq") \
    X(rep_movs_down, REPEATED, "std\nadd $24,%rdi\nrep movsq\ncld") \
    X(rep_movsb_overlap, REPEATED, "lea -3(%rdi),%rsi\nmov $600,%ecx\nsub $600,%rdi\nsub $600,%rsi\nrep movsb") \
    X(rep_stosb, REPEATED, "mov $40,%ecx\nrep stosb") \
    X(rep_stosl, REPEATED, "rep stosl") \
    X(rep_lodsw, REPEATED, "mov %rdi,%rsi\nrep lodsw") \
    X(repne_scasb, ARITHMETIC | REPEATED, "mov $80,%ecx\nrepne scasb") \
    X(repe_cmpsb, ARITHMETIC | REPEATED, "mov $80,%ecx\nrepe cmpsb") \
    X(rep_none, ARITHMETIC | REPEATED, "xor %ecx,%ecx\nrep movsb\nrep stosq\nrepe cmpsb") \
    X(movs_once, NONE, "movsq\nstosl\nlodsb") \
    X(translate, NONE, "mov %rdi,%rbx\nmov $3,%al\nxlat") \
    X(movbe, NONE, "movbe (%rdi),%eax\nmovbe %rax,-8(%rdi)") \
    X(sse_load, NONE, "movups (%rdi),%xmm1\nmovdqu -16(%rdi),%xmm2") \
    X(sse_aligned, NONE, "movaps (%rdi),%xmm1") \
    X(sse_store, NONE, "movups %xmm3,(%rdi)\nmovaps %xmm4,(%rdi)") \
    X(sse_halves, NONE, "movlps (%rdi),%xmm1\nmovhpd %xmm2,(%rdi)\nmovss (%rdi),%xmm5\nmovsd %xmm6,(%rdi)") \
    X(sse_memory_operand, NONE, "addps (%rdi),%xmm1") \
    X(sse_integer, NONE, "movdqu (%rdi),%xmm0\npaddd %xmm0,%xmm1\npshufd $27,%xmm1,%xmm2\npmaddwd %xmm0,%xmm3") \
    X(sse_masked_store, WIDE, "pcmpeqd %xmm0,%xmm0\nmaskmovdqu %xmm0,%xmm1") \
    X(sse_insert, NONE, "pinsrw $3,(%rdi),%xmm1\npextrw $2,%xmm1,%eax") \
    X(sse_convert, NONE, "cvtsi2sdq (%rdi),%xmm0\ncvttsd2si %xmm0,%rax\ncvtps2pd (%rdi),%xmm1\ncvtsd2ss %xmm0,%xmm2") \
    X(sse_compare, 0x45, "movsd (%rdi),%xmm0\nucomisd %xmm1,%xmm0") \
    X(sse_invalid, NONE, "pcmpeqd %xmm0,%xmm0\nsqrtsd %xmm0,%xmm1\nxorps %xmm2,%xmm2\ndivps %xmm2,%xmm2\ndivps %xmm2,%xmm3") \
    X(sse_denormal, NONE, "mov $5,%eax\nmovd %eax,%xmm0\nmulss %xmm0,%xmm1\naddss %xmm0,%xmm2\nmov $0x00800001,%eax\nmovd %eax,%xmm3\nmulss %xmm3,%xmm3") \
    X(sse_flush, NONE, "movl $0x9fc0,-4(%rsp)\nldmxcsr -4(%rsp)\nmov $5,%eax\nmovd %eax,%xmm0\naddss %xmm0,%xmm0\nmov $0x00800001,%eax\nmovd %eax,%xmm3\nmulss %xmm3,%xmm3\nstmxcsr -8(%rsp)\nmov -8(%rsp),%eax") \
    X(sse_rounding, NONE, "movl $0x7f80,-4(%rsp)\nldmxcsr -4(%rsp)\ncvtss2si %xmm1,%eax\nmov $3,%ecx\ncvtsi2ss %ecx,%xmm2\ndivss %xmm2,%xmm1\nsqrtss %xmm2,%xmm4") \
    X(sse_unmasked_divide, NONE, "movl $0x1d80,-4(%rsp)\nldmxcsr -4(%rsp)\nxorps %xmm0,%xmm0\ndivss %xmm0,%xmm1\nmov $9,%eax") \
    X(sse_unmasked_invalid, NONE, "movl $0x1f00,-4(%rsp)\nldmxcsr -4(%rsp)\nxorpd %xmm0,%xmm0\nadd $1,%rax\ndivpd %xmm0,%xmm0\nmov $9,%eax") \
    X(sse_unmasked_denormal, NONE, "movl $0x1e80,-4(%rsp)\nldmxcsr -4(%rsp)\nmov $5,%eax\nmovd %eax,%xmm0\naddss %xmm1,%xmm0\nmov $9,%eax") \
    X(sse_unmasked_inexact, NONE, "movl $0x0f80,-4(%rsp)\nldmxcsr -4(%rsp)\ncvtps2pd %xmm1,%xmm2\nsqrtpd %xmm2,%xmm2\nmov $9,%eax") \
    X(sse_bad_control, NONE, "movl $0x10000,-4(%rsp)\nldmxcsr -4(%rsp)") \
    X(sse_load_control, NONE, "ldmxcsr (%rdi)") \
    X(sse_store_control, NONE, "stmxcsr (%rdi)") \
    X(x87_arithmetic, NONE, "fld1\nfldpi\nfadd %st,%st(1)\nfdivp %st,%st(1)\nfsqrt\nfstpt -16(%rsp)\nmov -16(%rsp),%rax") \
    X(x87_load, NONE, "fldt (%rdi)\nfldl (%rdi)\nflds (%rdi)\nfildll (%rdi)\nfilds (%rdi)") \
    X(x87_store, FRAME, "fldpi\nfld %st\nfstps (%rdi)\nfstpt (%rdi)") \
    X(x87_store_keeps, NONE, "fldpi\nfstpl (%rdi)\nfld1") \
    X(x87_decimal, FRAME, "fldpi\nfbstp (%rdi)\nfbld (%rdi)") \
    X(x87_precision, NONE, "movw $0x07f,-2(%rsp)\nfldcw -2(%rsp)\nfld1\nfldpi\nfdivrp %st,%st(1)\nfst %st(1)") \
    X(x87_rounding, NONE, "movw $0xb7f,-2(%rsp)\nfldcw -2(%rsp)\nfldl2e\nfrndint\nfldlg2\nfistpl -8(%rsp)\nmov -8(%rsp),%eax") \
    X(x87_transcendental, NONE, "fldln2\nf2xm1\nfld1\nfyl2x\nfldpi\nfsin\nfld1\nfpatan\nfldpi\nfcos\nfptan") \
    X(x87_compare, 0x45, "fld1\nfldz\nfcomi %st(1),%st\nfucomip %st(1),%st\nfxam\nfnstsw %ax") \
    X(x87_overflow, NONE, "fld1\nfld1\nfld1\nfld1\nfld1\nfld1\nfld1\nfld1\nfld1\nfnstsw %ax") \
    X(x87_underflow, NONE, "fstp %st(0)\nfadd %st(3),%st\nfnstsw %ax") \
    X(x87_unmasked, NONE, "movw $0x37b,-2(%rsp)\nfldcw -2(%rsp)\nfld1\nfldz\nfdivrp %st,%st(1)\nmov $1,%eax\nmov $2,%ebx\nfwait\nmov $3,%ecx") \
    X(x87_unmasked_memory, NONE, "movw $0x37e,-2(%rsp)\nfldcw -2(%rsp)\nfldz\nfldz\nfdivp %st,%st(1)\nmov $1,%eax\nflds (%rdi)\nmov $3,%ecx") \
    X(x87_pending_no_wait, NONE, "movw $0x37b,-2(%rsp)\nfldcw -2(%rsp)\nfld1\nfldz\nfdivrp %st,%st(1)\nfnstsw %ax\nfnclex\nfld1\nfnstcw -4(%rsp)\nmov -4(%rsp),%bx") \
    X(x87_environment, FRAME, "fld1\nfldpi\nfnstenv -32(%rsp)\nmovq $0,-20(%rsp)\nmovq $0,-12(%rsp)\nmov -32(%rsp),%rax\nmov -24(%rsp),%ecx\nfldenv -32(%rsp)") \
    X(x87_save, FRAME, "fld1\nfldpi\nfnsave -128(%rsp)\nmovq $0,-116(%rsp)\nmovq $0,-108(%rsp)\nmov -124(%rsp),%eax\nfrstor -128(%rsp)\nfaddp") \
    X(x87_environment_fault, WIDE | FRAME, "fld1\nfnstenv (%rdi)\nmovq $0,12(%rdi)\nmovq $0,20(%rdi)") \
    X(x87_save_fault, WIDE | FRAME, "fld1\nfnsave (%rdi)\nmovq $0,12(%rdi)\nmovq $0,20(%rdi)") \
    X(x87_restore_fault, WIDE, "frstor (%rdi)") \
    X(x87_move, NONE, "fld1\nfldz\nfcmovb %st(1),%st\nstc\nfcmovb %st(1),%st\nffree %st(1)\nfincstp\nfdecstp\nfdecstp") \
    X(x87_remainder, NONE, "fld1\nfldpi\nfprem\nfnstsw %ax\nfldpi\nfprem1\nfscale\nfxtract\nfabs\nfchs") \
    X(mmx, NONE, "movq (%rdi),%mm0\npaddw %mm0,%mm1\nmovq %mm1,-8(%rdi)") \
    X(mmx_then_x87, NONE, "mov $7,%eax\nmovd %eax,%mm3\nfnstsw %ax\nfld1\nfnstsw -2(%rsp)\nemms\nfld1\nfaddp") \
    X(x87_then_mmx, NONE, "fldpi\nmovq %mm0,%rax\nmovq %mm7,%rbx\nmovd %ebx,%mm0\npcmpeqb %mm2,%mm2\nfnstsw %ax") \
    X(mmx_to_sse, NONE, "mov $7,%eax\nmovd %eax,%mm3\nmovq2dq %mm3,%xmm1\nmovdq2q %xmm2,%mm4\ncvtpi2ps %mm3,%xmm5\nemms") \
    X(mmx_after_exception, NONE, "movw $0x37b,-2(%rsp)\nfldcw -2(%rsp)\nfld1\nfldz\nfdivrp %st,%st(1)\nmov $1,%eax\nmovd %eax,%mm3\nmov $3,%ecx") \
    X(fxsave, WIDE | FRAME, "and $-16,%rdi\nfldpi\nfxsave (%rdi)\nmovw $0,6(%rdi)\nmovq $0,8(%rdi)\nmovq $0,16(%rdi)\nmovl $0,28(%rdi)") \
    X(fxsave_unaligned, NONE, "fxsave 8(%rsi)") \
    X(fxrstor, WIDE | FRAME, "fxsave 512(%rsi)\nmovw $0,518(%rsi)\nmovq $0,520(%rsi)\nmovq $0,528(%rsi)\nmovl $0,540(%rsi)\nfldpi\nfldpi\naddps %xmm1,%xmm2\nfxrstor 512(%rsi)") \
    X(fxrstor_fault, WIDE, "and $-16,%rdi\nfxrstor (%rdi)") \
    X(undefined, NONE, "add $1,%rax\nud2") \
    X(undefined_prefix, NONE, ".byte 0xf0\nmov %rax,%rbx") \
    X(undefined_lock_load, NONE, ".byte 0xf0,0x48,0x03,0x07") \
    X(too_long, NONE, ".byte 0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x90") \
    X(privileged, NONE, "cli\nmov $1,%eax") \
    X(privileged_hlt, NONE, "hlt") \
    X(privileged_cr, NONE, "mov %cr0,%rax") \
    X(privileged_io, NONE, "in $0x64,%al") \
    X(privileged_msr, NONE, "rdmsr") \
    X(software_interrupt, NONE, "int $0x81") \
    X(breakpoint, NONE, "inc %rax\nint3\ninc %rax") \
    X(trap_flag, NONE, "pushf\norl $0x100,(%rsp)\npopf\nnop\nmov $1,%eax") \
    X(trap_flag_string, REPEATED, "pushf\norl $0x100,(%rsp)\npopf\nrep stosb\nmov $1,%eax") \
    X(trap_after_syscall, NONE, "mov $1000,%eax\nsyscall\nxor %eax,%eax\nxor %ecx,%ecx\nxor %r11d,%r11d") \
    X(segments, NONE, "mov %ss,%eax\nmov %cs,%ebx\nxor %ecx,%ecx\nmov %cx,%es\nmov %es,%edx\nmov %cx,%ds") \
    X(segment_bad, NONE, "mov $0x5f,%eax\nmov %ax,%ds") \
    X(verify, ZERO, "mov %ss,%eax\nverr %ax\nverw %ax\nmov %cs,%ebx\nlar %bx,%rcx\nlsl %bx,%rdx") \
    X(far_call, FRAME, "mov %cs,%eax\nmov %eax,-4(%rsi)\nlea 1f(%rip),%rbx\nmov %ebx,-8(%rsi)\nlcall *-8(%rsi)\njmp 2f\n1: lretl\n2: nop") \
    X(interrupt_return, NONE, "mov %ss,%eax\nmov %rsp,%rcx\nlea 1f(%rip),%rbx\npush %rax\npush %rcx\npush $0x246\nmov %cs,%edx\npush %rdx\npush %rbx\niretq\nud2\n1: nop") \
    X(bmi, NONE, "andn (%rdi),%rbx,%rax\nbextr %rcx,(%rdi),%rdx\nrorx $5,(%rdi),%r8\nshlx %rcx,(%rdi),%r9\npdep (%rdi),%rbx,%r10\npext (%rdi),%rbx,%r11\nmulx (%rdi),%r12,%r13") \
    X(bit_scan, NONE, "bsf (%rdi),%rax\nbsr (%rdi),%ebx\nlzcnt (%rdi),%rcx\ntzcnt (%rdi),%edx\npopcnt (%rdi),%r8") \
    X(crc32, NONE, "crc32q (%rdi),%rax\ncrc32b (%rdi),%ebx") \
    X(conditional_load, NONE, "cmp %rax,%rbx\ncmovz (%rdi),%rcx\ncmovnz %rdx,%rcx") \
    X(set_condition, NONE, "cmp %rax,%rbx\nsetb (%rdi)\nseto 1(%rdi)") \
    X(loops, NONE, "1: add $3,%rax\nloop 1b\nmov $2,%ecx\n2: inc %rbx\nloopne 2b\njrcxz 3f\nnop\n3: nop") \
    X(avx_load, NONE, "vmovdqu (%rdi),%ymm1\nvextracti128 $1,%ymm1,%xmm2\nvzeroupper") \
    X(avx_masked, WIDE, "vpcmpeqd %xmm0,%xmm0,%xmm0\nvpslldq $8,%xmm0,%xmm0\nvmaskmovps (%rdi),%xmm0,%xmm3\nvmaskmovps %xmm3,%xmm0,(%rdi)") \
    X(avx_gather, STOPS, "vpcmpeqd %xmm0,%xmm0,%xmm0\nvpxor %xmm1,%xmm1,%xmm1\nvpinsrd $1,%ecx,%xmm1,%xmm1\nvpgatherdd %xmm0,(%rdi,%xmm1,4),%xmm2") \
    X(aes, NONE, "aesenc %xmm1,%xmm2\naesdeclast %xmm3,%xmm4\npclmulqdq $1,%xmm1,%xmm5") \
    X(string_compare, 0x8c1, "movdqu -16(%rdi),%xmm0\npcmpistri $12,%xmm1,%xmm0")
